"""One compressed projection: sizes and bytes (`spec`), tensors (`sparse_factor`), what holds for them (`checks`)."""
