"""The `fedbus` command."""
