"""The HTTP side of a system VM of CloudStack: download links, browser uploads and copies between zones."""
