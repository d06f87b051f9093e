"""What the objectives' models share: the output contract, gathered heads, sums by example, sampling, the stock export."""
