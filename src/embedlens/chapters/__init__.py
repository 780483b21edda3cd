"""What the book's chapters measure, draw and judge: one or two modules per chapter, on top of the package.

Nothing below imports from here. `page`, `scenes` and `card` serve all chapters and the model card; the others are
named by their subject:

                                    05  lengths, grounding
                                    06  one_patch, colour_sources
    03  sinkhood, sink_removal      07  decoupling, decoupling_figures
    04  emptiness, controls         08  orderings, shootout
    09  other_models                03, 04, 07  questionnaires (one question of each family about a picture)
"""
