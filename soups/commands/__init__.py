"""Commands of the `soups` program that are no business of merging."""
