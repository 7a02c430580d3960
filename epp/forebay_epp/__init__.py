"""The EPP: requests wait here until a model server has a free slot."""
