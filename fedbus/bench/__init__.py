"""How long a round takes with clients that do nothing, beside what the broker and aiormq allow at best."""
