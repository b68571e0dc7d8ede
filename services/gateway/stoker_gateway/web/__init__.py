"""Routes: read state → decide → act → answer."""
