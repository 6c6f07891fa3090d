"""Task files that come with the package."""
