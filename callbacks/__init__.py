"""Lightning adapters of the averages in `soups.averaging`."""
