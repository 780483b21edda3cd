"""What the book's chapters measure, draw and judge: one or two modules per chapter, on top of the package.

Nothing below imports from here. `page`, `scenes` and `card` serve all chapters and the model card; the others are
named by their subject:

    01  recurrence, census          05  lengths, grounding
    02  retrieval, hub_words        06  one_patch, colour_sources
    03  sinkhood, sink_removal      08  orderings, shootout
    04  emptiness, controls         09  other_models
"""
