"""Train several systems on the same data, each from several seeds, and show their scores and images on one page."""
