"""What several methods share: averaging, components of a product, server optimisers."""
