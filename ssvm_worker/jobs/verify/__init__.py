"""Read artifacts again and compare them with their manifests."""
