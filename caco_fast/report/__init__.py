"""The page of a run: what it measured and what its encoder and bank learned, as one HTML file without network."""
