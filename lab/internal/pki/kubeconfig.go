package pki

import (
	"encoding/base64"
	"fmt"
	"os"
)

// Target is the cluster that a kubeconfig names.
type Target struct {
	Name   string
	Server string
}

// Kubeconfig returns a kubeconfig, complete in itself, for the certificate issued as name.
func (d *Dir) Kubeconfig(t Target, name string) ([]byte, error) {
	crt, err := os.ReadFile(d.Path(name + ".crt"))
	if err != nil {
		return nil, fmt.Errorf("kubeconfig of %s: %w", name, err)
	}
	key, err := os.ReadFile(d.Path(name + ".key"))
	if err != nil {
		return nil, fmt.Errorf("kubeconfig of %s: %w", name, err)
	}
	return renderKubeconfig(t, name, d.pem, crt, key), nil
}

// KubeconfigFor signs a certificate for the identity and returns a kubeconfig with it; nothing is stored.
func (d *Dir) KubeconfigFor(t Target, id Identity) ([]byte, error) {
	der, key, err := d.sign(id)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig of %s: %w", id.User, err)
	}
	k, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	return renderKubeconfig(t, id.User, d.pem, certPEM(der), k), nil
}

func renderKubeconfig(t Target, user string, ca, crt, key []byte) []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: %[1]s
clusters:
- name: %[1]s
  cluster:
    server: %[2]s
    certificate-authority-data: %[4]s
users:
- name: %[3]q
  user:
    client-certificate-data: %[5]s
    client-key-data: %[6]s
contexts:
- name: %[1]s
  context:
    cluster: %[1]s
    user: %[3]q
`, t.Name, t.Server, user, b64(ca), b64(crt), b64(key))
}
