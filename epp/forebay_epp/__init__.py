"""The endpoint picker: requests wait here until a model server has room."""
