"""What people read: plans, comparisons with the plain model, generated pages."""
