"""Shapes: triangle meshes and volumes as sparse signed distance, and back to meshes in mm."""
