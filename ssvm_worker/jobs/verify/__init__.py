"""The job that reads artifacts again and compares them with their manifests."""
