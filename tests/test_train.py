from conftest import train
def test_smoke(tiny,tmp_path):
    assert train.main(tiny())==0
