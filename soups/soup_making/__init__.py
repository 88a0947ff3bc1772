"""From a pool of ingredients to a finished soup and its report, without Hydra.

`ingredients` belong together, `evaluator` scores and keeps predictions, `selection` runs a recipe on the held-out split,
`final_evaluation` looks at every split once after that, `soup` does all of it and writes the folder.
"""
