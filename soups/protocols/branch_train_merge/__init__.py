"""Branch-Train-Merge (arXiv:2208.03306): one expert language model a domain, used as an ensemble or as an average."""
