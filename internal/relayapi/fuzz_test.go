package relayapi

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
)

// FuzzWish: a wish that passes names a workload, a port and a header, and nothing that means more where it goes on.
func FuzzWish(f *testing.F) {
	f.Add([]byte(`{"connection":"c","namespace":"shop","workload":"Deployment/web","port":"http","local":3000,"header":"x-id","value":"lou"}`))
	f.Add([]byte(`{"connection":"c","namespace":"../kube-system","workload":"web","local":1}`))
	f.Add([]byte(`{"connection":"c","namespace":"shop","workload":"--mount","local":1}`))
	f.Add([]byte(`{"connection":"c","namespace":"shop","workload":"web","local":1,"header":"a: b\r\nc","value":"\u0000"}`))
	odd := regexp.MustCompile(`[\s%?#\\]|\.\./|//`)
	f.Fuzz(func(t *testing.T, text []byte) {
		var w Wish
		if json.Unmarshal(text, &w) != nil || w.Check() != nil {
			return
		}
		if s := w.Namespace + "/" + w.Workload; odd.MatchString(s) || strings.Count(s, "/") > 2 || strings.HasPrefix(w.Workload, "-") || w.Name() == "" || w.Local == 0 {
			t.Errorf("%+v", w)
		}
		if strings.ContainsAny(w.Header+w.Value+w.Port, "\r\n\x00") {
			t.Errorf("%+v", w)
		}
		_ = w.String()
	})
}
