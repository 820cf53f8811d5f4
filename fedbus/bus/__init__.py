"""Exchanges and queues as data, and the roads to them: RabbitMQ and its in-memory twin."""
