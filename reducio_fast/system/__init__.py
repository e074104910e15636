"""Services for all rooms: errors, devices, environment variables, clocks, the cache folder, atomic file writes."""
