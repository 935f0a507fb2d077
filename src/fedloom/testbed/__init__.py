"""The demo's model, client data and settings, made by `scripts/make_data.py` and `scripts/make_base_model.py`."""
