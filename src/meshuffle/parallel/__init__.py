"""From a Plan to ranks that compute together: lowering, pipeline, batch norm, gradients."""
