"""From a Plan to ranks that compute together: batch norm and data parallel, so far."""
