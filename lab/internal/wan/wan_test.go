package wan

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

func ask(name string, kind uint16) *dns.Msg {
	return reply(new(dns.Msg).SetQuestion(name, kind))
}

func TestReply(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  uint16
		rcode int
		want  string
	}{
		{"example.com.", dns.TypeA, dns.RcodeSuccess, plan.Outside4.String()},
		{"WWW.Example.Com.", dns.TypeAAAA, dns.RcodeSuccess, plan.Outside6.String()},
		{"outside.test.", dns.TypeMX, dns.RcodeSuccess, ""},
		{"kubernetes.default.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, ""},
		{"nothing.example.com.", dns.TypeA, dns.RcodeNameError, ""},
		{".", dns.TypeNS, dns.RcodeNameError, ""},
	} {
		m := ask(c.name, c.kind)
		if m.Rcode != c.rcode {
			t.Errorf("%s: %s, want %s", c.name, dns.RcodeToString[m.Rcode], dns.RcodeToString[c.rcode])
		}
		if c.want == "" {
			if len(m.Answer) > 0 || len(m.Ns) != 1 {
				t.Errorf("%s: an empty answer has %d records and %d authorities", c.name, len(m.Answer), len(m.Ns))
			}
			continue
		}
		if len(m.Answer) != 1 || !strings.HasSuffix(m.Answer[0].String(), "\t"+c.want) || m.Answer[0].Header().Ttl != 30 {
			t.Errorf("%s: %v, want %s", c.name, m.Answer, c.want)
		}
	}
	if m := reply(new(dns.Msg)); m.Rcode != dns.RcodeFormatError {
		t.Errorf("no question: %s", dns.RcodeToString[m.Rcode])
	}
}

// TestRulesParse lets nft check the rules, where it is installed and may be used.
func TestRulesParse(t *testing.T) {
	l := plan.Lab{Name: "lab", Index: 1, Nodes: 2}
	for name, text := range map[string]string{"router": rules(l), "node": masquerade(l)} {
		cmd := exec.Command("unshare", "--net", "nft", "--check", "--file", "-")
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.CombinedOutput()
		if err != nil && strings.Contains(string(out), "syntax error") {
			t.Errorf("%s: %s\n%s", name, out, text)
		} else if err != nil {
			t.Logf("%s: not checked: %v %s", name, err, out)
		}
	}
}

func TestRulesNameTheAPIServerOnly(t *testing.T) {
	got := rules(plan.Lab{Name: "lab", Index: 7, Nodes: 1})
	if !strings.Contains(got, `iifname "laptop*" ip daddr 10.77.7.11 tcp dport { 6443, 30000-32767 } accept`) {
		t.Errorf("the API server is not named:\n%s", got)
	}
	if !strings.Contains(got, "policy drop") {
		t.Errorf("what is not named is not dropped:\n%s", got)
	}
}
