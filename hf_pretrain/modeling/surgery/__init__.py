"""Makes a stock model smaller: cuts layers, trims its vocabulary."""
