package relayapi

import (
	"os/exec"
	"testing"
)

// A shell reads the line as it was meant, whatever the authority's file has besides.
func TestSecretCommand(t *testing.T) {
	const kubectl = "kubectl() { cat; printf '<%s>' \"$@\"; }; "
	create := "<create><secret><generic><doppel-relay><--namespace=team-a><--from-literal=token=doppel_link_X>"
	end := "<--dry-run=client><-o><yaml><apply><-f><->"
	for name, c := range map[string]struct{ ca, want string }{
		"an authority that everybody knows": {"", create + end},
		"one of its own": {
			"Ann's:\n-----BEGIN CERTIFICATE-----\nMIIB$x\n-----END CERTIFICATE-----\n",
			create + "<--from-literal=ca.crt=Ann's:\n-----BEGIN CERTIFICATE-----\nMIIB$x\n-----END CERTIFICATE----->" + end,
		},
	} {
		out, err := exec.CommandContext(t.Context(), "sh", "-c", kubectl+SecretCommand("team-a", "doppel_link_X", c.ca)).CombinedOutput()
		if err != nil || string(out) != c.want {
			t.Errorf("%s: %q, want %q: %v", name, out, c.want, err)
		}
	}
}
