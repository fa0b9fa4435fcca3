"""What the procedural street scenes are made of: a painter with a camera, figures, a street, what stands on it."""
