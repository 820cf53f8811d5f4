"""Clients with valid credentials that mean ill, and what stops each of them."""
