"""From a Plan to ranks that compute together: lowering, conversions, batch norm, gradients."""
