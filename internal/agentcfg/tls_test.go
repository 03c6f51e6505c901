package agentcfg

import (
	"reflect"
	"strings"
	"testing"
)

func TestTLSSecrets(t *testing.T) {
	for name, tt := range map[string]struct {
		server, client string
		want           map[uint16]Secrets
		err            string
	}{
		"none":              {"", "", map[uint16]Secrets{}, ""},
		"one":               {"8443=web-tls", "", map[uint16]Secrets{8443: {Server: "web-tls"}}, ""},
		"several, spaces":   {" 8443 = web-tls , 9443=a.b ", "9443=c", map[uint16]Secrets{8443: {Server: "web-tls"}, 9443: {"a.b", "c"}}, ""},
		"no port":           {"web-tls", "", nil, `doppel.dev/tls: "web-tls" is not PORT=SECRET`},
		"port 0":            {"0=web-tls", "", nil, "is not PORT=SECRET"},
		"a port too large":  {"70000=web-tls", "", nil, "is not PORT=SECRET"},
		"no name":           {"8443=", "", nil, "is not PORT=SECRET"},
		"no secret's name":  {"8443=Web", "", nil, "is not PORT=SECRET"},
		"nothing between":   {"8443=a,,9443=b", "", nil, `"" is not PORT=SECRET`},
		"twice":             {"8443=a,8443=b", "", nil, "port 8443 is there twice"},
		"a client's alone":  {"", "8443=c", nil, "doppel.dev/tls-client: port 8443 is not in doppel.dev/tls"},
		"a client's, twice": {"8443=a", "8443=c,8443=d", nil, "port 8443 is there twice"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := TLSSecrets(map[string]string{AnnotationTLS: tt.server, AnnotationTLSClient: tt.client})
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("%v, want %q", err, tt.err)
			}
			if err == nil && !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%v", got)
			}
		})
	}
}
