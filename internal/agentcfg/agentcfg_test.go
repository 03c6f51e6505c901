package agentcfg

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const valid = `{"managers":["m:8082"],"managerKey":"sha256:k","healthPort":9900,"ports":[
	{"protocol":"TCP","containerPort":8080,"container":"app","agentPort":9901,"way":"name","name":"http"},
	{"protocol":"TCP","containerPort":3000,"container":"app","agentPort":9902,"probePort":9903,"way":"redirect"}]}`

func TestParse(t *testing.T) {
	c, err := Parse(valid)
	if err != nil {
		t.Fatal(err)
	}
	if !c.Covers("TCP", 3000) || c.Covers("UDP", 3000) || c.Covers("TCP", 9901) {
		t.Error("Covers is wrong")
	}
	if !c.NeedsRedirect() || (&Config{Ports: c.Ports[:1]}).NeedsRedirect() {
		t.Error("NeedsRedirect is wrong")
	}
	again, err := Parse(c.String())
	if err != nil || !cmp.Equal(c, again) {
		t.Errorf("String and Parse differ: %v %s", err, cmp.Diff(c, again))
	}
}

// TestVersion1 reads what stands in pods that were injected by the first manager: they and their agents outlive upgrades. The file is never rewritten.
func TestVersion1(t *testing.T) {
	text, err := os.ReadFile("testdata/version1.json")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	var before, after any
	for text, v := range map[string]*any{string(text): &before, c.String(): &after} {
		if err := json.Unmarshal([]byte(text), v); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Error(diff)
	}
	if later, err := Parse(strings.Replace(string(text), `"managers"`, `"later":{"more":1},"managers"`, 1)); err != nil || !cmp.Equal(c, later) {
		t.Errorf("with a field of a later version: %v", err)
	}
}

func TestParseErrors(t *testing.T) {
	for name, tt := range map[string]struct{ from, to, want string }{
		"not JSON":            {valid, "no", "agent configuration:"},
		"no managers":         {`["m:8082"]`, `[]`, "managers and managerKey are required"},
		"no key":              {`sha256:k`, ``, "managers and managerKey are required"},
		"no health port":      {`"healthPort":9900,`, ``, "port 0 is zero or used twice"},
		"agent port twice":    {`9902`, `9901`, "port 9901 is zero or used twice"},
		"probe port twice":    {`9903`, `9900`, "port 9900 is zero or used twice"},
		"container port zero": {`8080`, `0`, "is not valid"},
		"protocol":            {`"TCP"`, `"SCTP"`, "is not valid"},
		"way":                 {`"redirect"`, `"magic"`, "is not valid"},
		"port twice":          {`3000`, `8080`, "container port TCP/8080 is taken twice"},
		"app's port":          {`9902`, `8080`, "port 8080 is the app's and the agent's"},
		"port too large":      {`9902`, `70000`, "agent configuration:"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse(strings.Replace(valid, tt.from, tt.to, 1)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(valid)
	f.Add(`{}`)
	f.Add(`null`)
	f.Fuzz(func(t *testing.T, s string) {
		c, err := Parse(s)
		if err != nil {
			return
		}
		again, err := Parse(c.String())
		if err != nil || !cmp.Equal(c, again) {
			t.Errorf("%q: %v %s", s, err, cmp.Diff(c, again))
		}
	})
}

// FuzzTLSSecrets: what people write into annotations is a list of ports and names, or an error.
func FuzzTLSSecrets(f *testing.F) {
	f.Add("8443=web-tls", "8443=client")
	f.Add("8443=web-tls, 9443=a.b", "")
	f.Add("0=x,=,65536=y", "1")
	f.Add("1=../x", "1=x")
	f.Fuzz(func(t *testing.T, server, client string) {
		all, err := TLSSecrets(map[string]string{AnnotationTLS: server, AnnotationTLSClient: client})
		if err != nil {
			return
		}
		for port, s := range all {
			if port == 0 || s.Server == "" || strings.ContainsAny(s.Server+s.Client, "/ \\\x00") {
				t.Errorf("%q, %q: %+v", server, client, all)
			}
		}
	})
}
