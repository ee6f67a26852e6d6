# Keys for the fleet's scenarios, and for nothing else: everybody can read them here.
{
  # of the host `web`
  web = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEu1sijGIOafRIs6l63jEp1fpMbzYBNOorMTWNLn6h7N web";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACBLtbIoxiDmn0SLOpet4xKdX6TG82ATTqKzE1jS5+oezQAAAIjpmrxG6Zq8
      RgAAAAtzc2gtZWQyNTUxOQAAACBLtbIoxiDmn0SLOpet4xKdX6TG82ATTqKzE1jS5+oezQ
      AAAEBE2BaZ0EWAeUu5lKF49eG58sU4ywQ9J98gznId0rNruUu1sijGIOafRIs6l63jEp1f
      pMbzYBNOorMTWNLn6h7NAAAAA3dlYgEC
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of the host `db`
  db = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMmXq3QZcZW/r0HH1dAF6Z0B4PuDfWjD9vQsNd90Raqo db";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACDJl6t0GXGVv69Bx9XQBemdAeD7g31ow/b0LDXfdEWqqAAAAIhecptbXnKb
      WwAAAAtzc2gtZWQyNTUxOQAAACDJl6t0GXGVv69Bx9XQBemdAeD7g31ow/b0LDXfdEWqqA
      AAAEAHYPg3cFVuIgaL9xkcfIY4MDlJVZG+TN2UDc/aT4kICsmXq3QZcZW/r0HH1dAF6Z0B
      4PuDfWjD9vQsNd90RaqoAAAAAmRiAQID
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of the host `plain`
  plain = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB7o/pogVDnA3FDD+x/6fqiREP86OodE0zlgU+l3/xf+ plain";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACAe6P6aIFQ5wNxQw/sf+n6okRD/OjqHRNM5YFPpd/8X/gAAAIjCvz9gwr8/
      YAAAAAtzc2gtZWQyNTUxOQAAACAe6P6aIFQ5wNxQw/sf+n6okRD/OjqHRNM5YFPpd/8X/g
      AAAECl8fVephA18CUxtjHjdVvOCPm+hCmVRBlUk8zKKDZ/zx7o/pogVDnA3FDD+x/6fqiR
      EP86OodE0zlgU+l3/xf+AAAABXBsYWlu
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of the hub's sshd
  hub = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBzul/nZGE2swIcRMzXkSisqvNOFZrkAn6HuwE4kMgqO hub";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACAc7pf52RhNrMCHETM15EorKrzThWa5AJ+h7sBOJDIKjgAAAIhPhJYNT4SW
      DQAAAAtzc2gtZWQyNTUxOQAAACAc7pf52RhNrMCHETM15EorKrzThWa5AJ+h7sBOJDIKjg
      AAAECbIRQ6TjBqi7QAd3xYfdYsKM1cDdVVhwF69o53q8B6mBzul/nZGE2swIcRMzXkSisq
      vNOFZrkAn6HuwE4kMgqOAAAAA2h1YgEC
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of those who may publish
  signer = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGiGlwLGOZSI/SKTZepHt1GWIVRIz+tGRviS+/8pgPVH signer";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACBohpcCxjmUiP0ik2XqR7dRliFUSM/rRkb4kvv/KYD1RwAAAJBIV2G0SFdh
      tAAAAAtzc2gtZWQyNTUxOQAAACBohpcCxjmUiP0ik2XqR7dRliFUSM/rRkb4kvv/KYD1Rw
      AAAECu/e+uwrgXzL1zV8quFuHD3MowtqHA4M0GgsPg5tdVUmiGlwLGOZSI/SKTZepHt1GW
      IVRIz+tGRviS+/8pgPVHAAAABnNpZ25lcgECAwQFBgc=
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of nobody
  other = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIA4MDPC1aO+V9vHcH9RYdSek221OpFE9FxucQC4zkJP other";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACCAODAzwtWjvlfbx3B/UWHUnpNttTqRRPRcbnEAuM5CTwAAAIjUNXVf1DV1
      XwAAAAtzc2gtZWQyNTUxOQAAACCAODAzwtWjvlfbx3B/UWHUnpNttTqRRPRcbnEAuM5CTw
      AAAECcui90ko2AS4gJZX1KqpKDW0eGZvZEKMKuvsw/qkCnjYA4MDPC1aO+V9vHcH9RYdSe
      k221OpFE9FxucQC4zkJPAAAABW90aGVy
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of those who may publish from elsewhere
  publisher = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJZNoMkltkcM6+a546KZzUUBUw/PmJ0dm3Ec9fS7YHnI publisher";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACCWTaDJJbZHDOvmueOimc1FAVMPz5idHZtxHPX0u2B5yAAAAJDcQdxb3EHc
      WwAAAAtzc2gtZWQyNTUxOQAAACCWTaDJJbZHDOvmueOimc1FAVMPz5idHZtxHPX0u2B5yA
      AAAEBs6deMtBPeKc4qo8VJ8yCjlQHj8l4tuDJpTtjL02ohtpZNoMkltkcM6+a546KZzUUB
      Uw/PmJ0dm3Ec9fS7YHnIAAAACXB1Ymxpc2hlcgECAwQ=
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
  # of another one of them
  alice = {
    public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFs9q67p7RzQHn655I2rr0Al0kWyp0/vTlzzJk7JW/XF alice";
    private = ''
      -----BEGIN OPENSSH PRIVATE KEY-----
      b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
      QyNTUxOQAAACBbPauu6e0c0B5+ueSNq69AJdJFsqdP705c8yZOyVv1xQAAAIi0gfM+tIHz
      PgAAAAtzc2gtZWQyNTUxOQAAACBbPauu6e0c0B5+ueSNq69AJdJFsqdP705c8yZOyVv1xQ
      AAAEDI7MnMH3KdKSCjVIEE1POXuS5fIKkH023PBP2Mxboy21s9q67p7RzQHn655I2rr0Al
      0kWyp0/vTlzzJk7JW/XFAAAABWFsaWNl
      -----END OPENSSH PRIVATE KEY-----
    '';
  };
}
