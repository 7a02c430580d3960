"""The endpoint picker: requests wait here, per model and criticality, until a model server has room."""
