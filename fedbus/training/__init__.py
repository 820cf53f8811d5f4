"""What runs on a client: the user's training code and what is made of its results."""
