"""Write disk images as streams."""
