"""One thin file per solver of `forerun solve`."""
