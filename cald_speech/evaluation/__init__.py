"""Error rates of a model, with their intervals, and the report that holds every edit."""
