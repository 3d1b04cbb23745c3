"""Where a layer keeps its tokens: one file per layout, one contract (`base.Segment`)."""
