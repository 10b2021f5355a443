//! A miniature Odoo.
