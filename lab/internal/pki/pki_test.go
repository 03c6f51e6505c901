package pki

import (
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"os"
	"strings"
	"testing"
)

func TestIssue(t *testing.T) {
	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	id := Identity{User: "system:node:a", Groups: []string{"system:nodes"}, DNS: []string{"a"}, IPs: []netip.Addr{netip.MustParseAddr("10.77.0.11")}}
	if err := d.Issue("node1", id); err != nil {
		t.Fatal(err)
	}
	first := read(t, d.Path("node1.crt"))
	block, _ := pem.Decode(first)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(d.pem)
	for _, name := range []string{"a", "10.77.0.11"} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	if cert.Subject.CommonName != id.User || cert.Subject.Organization[0] != "system:nodes" {
		t.Errorf("subject %s", cert.Subject)
	}
	// A second time, also from a second opening, everything stays.
	again, err := Open(d.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Issue("node1", id); err != nil {
		t.Fatal(err)
	}
	if string(read(t, d.Path("node1.crt"))) != string(first) {
		t.Error("the certificate was issued twice")
	}
}

func TestKubeconfig(t *testing.T) {
	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	target := Target{Name: "lab-x", Server: "https://10.77.0.11:6443"}
	if _, err := d.Kubeconfig(target, "nobody"); err == nil {
		t.Error("a kubeconfig without a certificate")
	}
	conf, err := d.KubeconfigFor(target, Identity{User: "bob: the builder"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"server: https://10.77.0.11:6443\n", "current-context: lab-x\n", `name: "bob: the builder"`} {
		if !strings.Contains(string(conf), want) {
			t.Errorf("no %q in:\n%s", want, conf)
		}
	}
}

func read(t *testing.T, path string) []byte {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
