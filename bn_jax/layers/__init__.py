"""Framework shells around the core, without arithmetic of their own."""
