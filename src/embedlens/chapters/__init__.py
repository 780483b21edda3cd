"""What single pages of the book measure, draw and judge; on its way into `measures/` and the notebooks.

Nothing below imports from here. `page`, `scenes` and `card` serve several chapters and the model card; the others are
those of chapters 08 (orderings, shootout) and 09 (other_models).
"""
