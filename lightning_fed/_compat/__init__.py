"""What of third parties is not public, and which of their releases it is known of."""
