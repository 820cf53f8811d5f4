"""fedbus: federated learning whose server and clients meet only on a message broker."""
