"""Views: random transformations whose agreement is learned, and the fixed one that is scored."""
