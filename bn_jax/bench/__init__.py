"""Speed and accuracy, measured against the peers."""
