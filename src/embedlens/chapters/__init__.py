"""What single pages of the book measure, draw and judge; on its way into `measures/` and the notebooks.

Nothing below imports from here. `page`, `scenes` and `card` serve several chapters and the model card; other_models is
that of chapter 09.
"""
