"""Programs that judge a trained model. Imports `alignment`; nothing in `alignment` but its CLI imports this."""
