"""What goes to the Hub beside the weights: model cards made from what was logged, their plots, and uploads."""
